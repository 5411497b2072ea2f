// The first and only process of a lab guest: tells the host about its kernel, preserves memfds,
// loads the next kernel and jumps.
//
// It talks over the second serial port. A line ":KEY words" is a message; a line "@NAME LENGTH" is
// followed by LENGTH bytes, a file of the capture. Built with: cc -static -Os init.c
//
// /lab.conf holds "generations N", "initrd BYTES" and "cmdline ...", one a line.

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/klog.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <termios.h>
#include <unistd.h>

#ifndef __NR_kexec_file_load
#error "no kexec_file_load on this architecture"
#endif

static int port = -1;
static int generation;

static void put(const void *data, size_t len)
{
	const char *at = data;

	while (len) {
		ssize_t done = write(port, at, len);

		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			exit(1); // the kernel panics, and its console says so
		at += done;
		len -= done;
	}
}

static void say(const char *format, ...)
{
	char line[512];
	va_list args;
	int len;

	va_start(args, format);
	len = vsnprintf(line, sizeof(line) - 1, format, args);
	va_end(args);
	if (len > (int)sizeof(line) - 2)
		len = sizeof(line) - 2;
	line[len] = '\n';
	put(line, len + 1);
}

static void fail(const char *what)
{
	say(":FAIL %s: %s", what, strerror(errno));
	tcdrain(port);
	for (;;)
		pause();
}

static void send_bytes(const char *name, const void *data, size_t len)
{
	say("@%s %zu", name, len);
	put(data, len);
}

// All of a file in memory that is never freed; NULL where it cannot be read.
static char *slurp(int fd, size_t *len)
{
	size_t room = 1 << 16;
	char *data = malloc(room);

	*len = 0;
	while (data) {
		ssize_t got = read(fd, data + *len, room - *len - 1);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return NULL;
		if (got == 0)
			break;
		*len += got;
		if (*len + 1 == room)
			data = realloc(data, room *= 2);
	}
	if (data)
		data[*len] = 0;
	return data;
}

static char *slurp_path(const char *path, size_t *len)
{
	int fd = open(path, O_RDONLY);
	char *data = fd < 0 ? NULL : slurp(fd, len);

	if (fd >= 0)
		close(fd);
	return data;
}

static void send_path(const char *name, const char *path)
{
	size_t len;
	char *data = slurp_path(path, &len);

	if (data)
		send_bytes(name, data, len);
	free(data);
}

static void send_folder(const char *name, const char *path)
{
	DIR *dir = opendir(path);
	struct dirent *entry;
	char inner_name[512], inner_path[512];

	while (dir && (entry = readdir(dir))) {
		if (entry->d_name[0] == '.')
			continue;
		snprintf(inner_name, sizeof(inner_name), "%s/%s", name, entry->d_name);
		snprintf(inner_path, sizeof(inner_path), "%s/%s", path, entry->d_name);
		if (entry->d_type == DT_DIR)
			send_folder(inner_name, inner_path);
		else
			send_path(inner_name, inner_path);
	}
	if (dir)
		closedir(dir);
}

static void send_log(void)
{
	int room = klogctl(10, NULL, 0) + 1; // SYSLOG_ACTION_SIZE_BUFFER
	char *data = malloc(room);
	int len = data ? klogctl(3, data, room) : -1; // SYSLOG_ACTION_READ_ALL

	if (len >= 0)
		send_bytes("dmesg", data, len);
	free(data);
}

static void send_symbols(void)
{
	static const char *const wanted[] = {
		"_text", "machine_kexec", "kho_out", "page_offset_base", "phys_base",
	};
	size_t len;
	char *data = slurp_path("/proc/kallsyms", &len);
	char *line = data ? strtok(data, "\n") : NULL;

	for (; line; line = strtok(NULL, "\n")) {
		unsigned long long address;
		char kind, name[128];

		if (sscanf(line, "%llx %c %127s", &address, &kind, name) != 3)
			continue;
		for (size_t i = 0; i < sizeof(wanted) / sizeof(*wanted); i++)
			if (!strcmp(name, wanted[i]))
				say(":SYMBOL %s %#llx", name, address);
	}
	free(data);
}

// -- SHA-256 (FIPS 180-4), so that content need not go over a slow port ------------------------

static uint32_t rotate(uint32_t word, int bits)
{
	return word >> bits | word << (32 - bits);
}

// The first 32 bits of the fractional part of the square or cube root of a prime.
static uint32_t root_bits(int prime, int cube)
{
	unsigned __int128 low = 0, high = (unsigned __int128)1 << 40;
	unsigned __int128 target = (unsigned __int128)prime << (cube ? 96 : 64);

	while (high - low > 1) {
		unsigned __int128 middle = (low + high) / 2;
		unsigned __int128 power = cube ? middle * middle * middle : middle * middle;

		if (power <= target)
			low = middle;
		else
			high = middle;
	}
	return low;
}

static void sha256_block(uint32_t state[8], const uint32_t k[64], const uint8_t *block)
{
	uint32_t w[64], v[8];

	for (int i = 0; i < 16; i++)
		w[i] = (uint32_t)block[4 * i] << 24 | block[4 * i + 1] << 16 |
		       block[4 * i + 2] << 8 | block[4 * i + 3];
	for (int i = 16; i < 64; i++)
		w[i] = w[i - 16] + w[i - 7] +
		       (rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3) +
		       (rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10);
	memcpy(v, state, sizeof(v));
	for (int i = 0; i < 64; i++) {
		uint32_t t1 = v[7] + k[i] + w[i] + ((v[4] & v[5]) ^ (~v[4] & v[6])) +
			      (rotate(v[4], 6) ^ rotate(v[4], 11) ^ rotate(v[4], 25));
		uint32_t t2 = ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2])) +
			      (rotate(v[0], 2) ^ rotate(v[0], 13) ^ rotate(v[0], 22));

		memmove(v + 1, v, 7 * sizeof(*v));
		v[4] += t1;
		v[0] = t1 + t2;
	}
	for (int i = 0; i < 8; i++)
		state[i] += v[i];
}

static void sha256(const uint8_t *data, size_t len, char hex[65])
{
	uint32_t k[64], state[8];
	uint8_t tail[128] = { 0 };
	size_t whole = len & ~63ul, rest = len - whole, end = rest < 56 ? 64 : 128;

	for (int prime = 2, n = 0; n < 64; prime++) {
		int divisor = 2;

		while (prime % divisor)
			divisor++;
		if (divisor != prime)
			continue;
		if (n < 8)
			state[n] = root_bits(prime, 0);
		k[n++] = root_bits(prime, 1);
	}
	for (size_t at = 0; at < whole; at += 64)
		sha256_block(state, k, data + at);
	memcpy(tail, data + whole, rest);
	tail[rest] = 0x80;
	for (int i = 0; i < 8; i++)
		tail[end - 1 - i] = (uint64_t)len * 8 >> 8 * i;
	for (size_t at = 0; at < end; at += 64)
		sha256_block(state, k, tail + at);
	for (int i = 0; i < 8; i++)
		sprintf(hex + 8 * i, "%08x", state[i]);
}

// -- live update sessions --------------------------------------------------------------------

// include/uapi/linux/liveupdate.h, which few systems have installed.
struct session_args {
	uint32_t size;
	int32_t fd;
	uint8_t name[64];
};
struct file_args {
	uint32_t size;
	int32_t fd;
	uint64_t token;
};
struct finish_args {
	uint32_t size;
	uint32_t reserved;
};
#define CREATE_SESSION _IO(0xBA, 0x00)
#define RETRIEVE_SESSION _IO(0xBA, 0x01)
#define PRESERVE_FD _IO(0xBA, 0x40)
#define RETRIEVE_FD _IO(0xBA, 0x41)
#define FINISH _IO(0xBA, 0x42)

static const struct {
	const char *session;
	uint64_t token;
	size_t size;
	int seals;
} files[] = {
	{ "vm-a", 0x10, 12411, 0 },
	{ "vm-a", 0x11, 2 << 20, 0 },
	{ "vm-b", 0xdeadbeef, 1, F_SEAL_SHRINK | F_SEAL_GROW },
	{ "vm-b", 0x7, 0, 0 },
	{ "vm-b", 0x8, 256 << 10, 0 },
};
#define NR_FILES (sizeof(files) / sizeof(*files))

static int session_call(int device, unsigned int call, const char *name)
{
	struct session_args args = { .size = sizeof(args) };

	strcpy((char *)args.name, name);
	return ioctl(device, call, &args) < 0 ? -1 : args.fd;
}

// Content that differs from file to file and from generation to generation.
static void fill(uint8_t *data, size_t size, uint64_t token)
{
	uint64_t state = token * 0x9E3779B97F4A7C15u + generation + 1;

	for (size_t i = 0; i < size; i++) {
		state ^= state << 13;
		state ^= state >> 7;
		state ^= state << 17;
		data[i] = state >> 32;
	}
}

static int make_memfd(size_t i)
{
	int fd = memfd_create("lab", MFD_ALLOW_SEALING);
	uint8_t *data = malloc(files[i].size + 1);

	if (fd < 0 || !data)
		fail("memfd_create");
	fill(data, files[i].size, files[i].token);
	if (write(fd, data, files[i].size) != (ssize_t)files[i].size)
		fail("write to a memfd");
	free(data);
	if (lseek(fd, files[i].size / 2, SEEK_SET) < 0)
		fail("lseek in a memfd");
	if (files[i].seals && fcntl(fd, F_ADD_SEALS, files[i].seals) < 0)
		fail("F_ADD_SEALS");
	return fd;
}

static void preserve(int device)
{
	int session = -1;

	for (size_t i = 0; i < NR_FILES; i++) {
		struct file_args args = { .size = sizeof(args), .token = files[i].token };

		if (i == 0 || strcmp(files[i].session, files[i - 1].session))
			session = session_call(device, CREATE_SESSION, files[i].session);
		if (session < 0)
			fail("LIVEUPDATE_IOCTL_CREATE_SESSION");
		args.fd = make_memfd(i);
		if (ioctl(session, PRESERVE_FD, &args) < 0)
			say(":NOTE preserve %s %#llx: %s", files[i].session,
			    (unsigned long long)files[i].token, strerror(errno));
	}
	// Sessions stay open: to close one is to give it up.
}

static void retrieve_file(int session, size_t i)
{
	struct file_args args = { .size = sizeof(args), .token = files[i].token };
	char digest[65];
	size_t len;
	char *data;
	off_t pos;

	if (ioctl(session, RETRIEVE_FD, &args) < 0) {
		say(":NOTE retrieve %s %#llx: %s", files[i].session,
		    (unsigned long long)files[i].token, strerror(errno));
		return;
	}
	pos = lseek(args.fd, 0, SEEK_CUR);
	lseek(args.fd, 0, SEEK_SET);
	data = slurp(args.fd, &len);
	if (!data)
		fail("read of a retrieved memfd");
	sha256((uint8_t *)data, len, digest);
	say(":FILE %s %#llx %lld %#x %zu %s", files[i].session,
	    (unsigned long long)files[i].token, (long long)pos, fcntl(args.fd, F_GET_SEALS), len,
	    digest);
	free(data);
	close(args.fd);
}

static void finish(int session, const char *name)
{
	struct finish_args args = { .size = sizeof(args) };

	if (ioctl(session, FINISH, &args) < 0)
		say(":NOTE finish %s: %s", name, strerror(errno));
	close(session);
}

static void retrieve(int device)
{
	int session = -1;

	for (size_t i = 0; i < NR_FILES; i++) {
		if (i == 0 || strcmp(files[i].session, files[i - 1].session)) {
			if (session >= 0)
				finish(session, files[i - 1].session);
			session = session_call(device, RETRIEVE_SESSION, files[i].session);
			if (session < 0)
				say(":NOTE retrieve %s: %s", files[i].session, strerror(errno));
		}
		if (session >= 0)
			retrieve_file(session, i);
	}
	if (session >= 0)
		finish(session, files[NR_FILES - 1].session);
}

// -- the next kernel --------------------------------------------------------------------------

static void archive_entry(FILE *out, const char *name, unsigned int mode, const char *path)
{
	static unsigned int inode = 1;
	size_t len = 0;
	char *data = path ? slurp_path(path, &len) : NULL;

	if (path && !data)
		fail(path);
	fprintf(out, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s%c", inode++,
		mode, 0, 0, 1, 0, (unsigned int)len, 0, 0, 0, 0, (unsigned int)strlen(name) + 1, 0,
		name, 0);
	while (ftell(out) % 4)
		fputc(0, out);
	fwrite(data, 1, len, out);
	while (ftell(out) % 4)
		fputc(0, out);
	free(data);
}

// An initramfs like the one this generation came from; its tail of zeros is a hole.
static int make_initrd(size_t size)
{
	int fd = memfd_create("initrd", 0);
	FILE *out = fd < 0 ? NULL : fdopen(dup(fd), "w");

	if (!out)
		fail("memfd_create for the initrd");
	archive_entry(out, "init", 0100755, "/init");
	archive_entry(out, "lab.conf", 0100644, "/lab.conf");
	archive_entry(out, "kernel", 0100644, "/kernel");
	archive_entry(out, "TRAILER!!!", 0, NULL);
	if ((size_t)ftell(out) > size)
		size = ftell(out);
	if (fclose(out) || ftruncate(fd, (size + 511) & ~511ul))
		fail("the initrd");
	return fd;
}

static const char *setting(char *conf, const char *key)
{
	size_t len = strlen(key);

	for (char *line = conf; line; line = strchr(line, '\n'), line += !!line) {
		if (!strncmp(line, key, len) && line[len] == ' ') {
			char *value = strndup(line + len + 1, strcspn(line + len + 1, "\n"));
			return value ? value : "";
		}
		if (!strchr(line, '\n'))
			break;
	}
	return "";
}

static void load_next(char *conf)
{
	char cmdline[2048];
	int kernel = open("/kernel", O_RDONLY);
	int initrd = make_initrd(strtoul(setting(conf, "initrd"), NULL, 10));
	int len = snprintf(cmdline, sizeof(cmdline), "%s khogen=%d", setting(conf, "cmdline"),
			   generation + 1);

	if (kernel < 0)
		fail("/kernel");
	if (len >= (int)sizeof(cmdline)) {
		errno = E2BIG;
		fail("the next command line");
	}
	if (syscall(__NR_kexec_file_load, kernel, initrd, len + 1, cmdline, 0ul))
		fail("kexec_file_load");
	close(kernel);
	close(initrd);
}

// Before 6.19 the handover is finished by hand.
static void finalize(void)
{
	int fd = open("/sys/kernel/debug/kho/out/finalize", O_WRONLY);

	if (fd < 0)
		return;
	if (write(fd, "1", 1) != 1)
		fail("kho/out/finalize");
	close(fd);
	send_path("kho/out/finalize", "/sys/kernel/debug/kho/out/finalize");
}

static void open_port(void)
{
	struct termios mode;

	port = open("/dev/ttyS1", O_RDWR | O_NOCTTY);
	if (port < 0 || tcgetattr(port, &mode)) {
		printf("khosim-lab: no second serial port: %s\n", strerror(errno));
		fflush(stdout);
		exit(1);
	}
	cfmakeraw(&mode);
	cfsetspeed(&mode, B115200);
	tcsetattr(port, TCSANOW, &mode);
}

static void mount_all(void)
{
	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mkdir("/dev", 0755);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL); // EBUSY where the kernel did it
	mount("debugfs", "/sys/kernel/debug", "debugfs", 0, NULL);
}

int main(void)
{
	static const char *const plain[] = {
		"iomem", "cmdline", "buddyinfo", "zoneinfo", "meminfo",
	};
	char path[64], go;
	struct utsname uts;
	size_t len;
	char *conf, *cmdline, *mark;
	int device;

	mount_all();
	open_port();
	conf = slurp_path("/lab.conf", &len);
	cmdline = slurp_path("/proc/cmdline", &len);
	if (!conf || !cmdline)
		fail("/lab.conf or /proc/cmdline");
	mark = strstr(cmdline, "khogen=");
	generation = mark ? atoi(mark + strlen("khogen=")) : 0;
	uname(&uts);
	say(":GENERATION %d", generation);
	say(":RELEASE %s %s %ld", uts.release, uts.machine, sysconf(_SC_PAGESIZE));
	send_log();
	for (size_t i = 0; i < sizeof(plain) / sizeof(*plain); i++) {
		snprintf(path, sizeof(path), "/proc/%s", plain[i]);
		send_path(plain[i], path);
	}
	send_folder("kho", "/sys/kernel/debug/kho");
	send_symbols();
	device = open("/dev/liveupdate", O_RDWR);
	if (device < 0)
		say(":NOTE no /dev/liveupdate: %s", strerror(errno));
	else
		say(":LIVEUPDATE");
	if (device >= 0 && generation > 0)
		retrieve(device);
	if (generation == atoi(setting(conf, "generations"))) {
		say(":DONE");
		tcdrain(port);
		read(port, &go, 1);
		reboot(RB_POWER_OFF);
	}
	if (device >= 0)
		preserve(device);
	finalize();
	load_next(conf);
	say(":READY");
	tcdrain(port);
	while (read(port, &go, 1) != 1) // the host sets its breakpoint meanwhile
		;
	reboot(RB_KEXEC);
	fail("reboot into the loaded kernel");
}
