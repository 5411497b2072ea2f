/*
 * A radix tree of the shape that kho-v4 uses with 4 KiB pages, fed one page at a time: what
 * khosim's range-wise work is measured against.
 *
 * Six levels: five of tables with 512 entries, below them bitmaps of 32768 bits; all are one page.
 * A key carries the order as the position of its highest bit: (1 << (52 - order)) | frame number in
 * units of that order.
 */
#include <stdint.h>
#include <stdlib.h>

enum {
    PAGE_SHIFT = 12,
    TABLE_BITS = 9,
    BITMAP_BITS = PAGE_SHIFT + 3,
    ROOT_LEVEL = 5, /* level 0 holds the bitmaps */
};

struct node {
    union {
        struct node *table[1 << TABLE_BITS];
        uint64_t bitmap[(1 << BITMAP_BITS) / 64];
    };
};

struct walk {
    uint64_t nr_keys;
    uint64_t phys_sum;
    uint64_t nr_nodes;
};

static uint64_t encode_key(uint64_t phys, unsigned int order)
{
    return (UINT64_C(1) << (64 - PAGE_SHIFT - order)) | (phys >> (PAGE_SHIFT + order));
}

static uint64_t decode_phys(uint64_t key)
{
    unsigned int top = 63 - __builtin_clzll(key);
    unsigned int order = 64 - PAGE_SHIFT - top;

    return (key ^ (UINT64_C(1) << top)) << (PAGE_SHIFT + order);
}

static unsigned int shift_of(unsigned int level)
{
    return BITMAP_BITS + (level - 1) * TABLE_BITS;
}

static struct node *new_node(void)
{
    return calloc(1, sizeof(struct node));
}

static int add_key(struct node *root, uint64_t key)
{
    struct node *node = root;
    uint64_t bit = key & ((1 << BITMAP_BITS) - 1);

    for (unsigned int level = ROOT_LEVEL; level > 0; level--) {
        struct node **slot = &node->table[(key >> shift_of(level)) & ((1 << TABLE_BITS) - 1)];

        if (!*slot && !(*slot = new_node()))
            return -1;
        node = *slot;
    }
    node->bitmap[bit / 64] |= UINT64_C(1) << (bit % 64);
    return 0;
}

static void walk_bitmap(const struct node *leaf, uint64_t key, struct walk *walk)
{
    for (unsigned int i = 0; i < (1 << BITMAP_BITS) / 64; i++) {
        for (uint64_t word = leaf->bitmap[i]; word; word &= word - 1) {
            uint64_t bit = i * 64 + (unsigned int)__builtin_ctzll(word);

            walk->nr_keys++;
            walk->phys_sum += decode_phys(key | bit);
        }
    }
}

static void walk_tree(const struct node *node, unsigned int level, uint64_t key, struct walk *walk)
{
    walk->nr_nodes++;
    if (level == 0) {
        walk_bitmap(node, key, walk);
        return;
    }
    for (uint64_t i = 0; i < 1 << TABLE_BITS; i++)
        if (node->table[i])
            walk_tree(node->table[i], level - 1, key | (i << shift_of(level)), walk);
}

static void free_tree(struct node *node, unsigned int level)
{
    if (level > 0)
        for (unsigned int i = 0; i < 1 << TABLE_BITS; i++)
            if (node->table[i])
                free_tree(node->table[i], level - 1);
    free(node);
}

static int walk_and_free(struct node *root, int err, struct walk *walk)
{
    *walk = (struct walk){0};
    if (!err)
        walk_tree(root, ROOT_LEVEL, 0, walk);
    free_tree(root, ROOT_LEVEL);
    return err;
}

int feed_run(uint64_t start_pfn, uint64_t nr_pages, struct walk *walk)
{
    struct node *root = new_node();
    int err = 0;

    if (!root)
        return -1;
    for (uint64_t pfn = start_pfn; !err && pfn < start_pfn + nr_pages; pfn++)
        err = add_key(root, encode_key(pfn << PAGE_SHIFT, 0));
    return walk_and_free(root, err, walk);
}

int feed_pfns(const uint64_t *pfns, size_t nr_pages, struct walk *walk)
{
    struct node *root = new_node();
    int err = 0;

    if (!root)
        return -1;
    for (size_t i = 0; !err && i < nr_pages; i++)
        err = add_key(root, encode_key(pfns[i] << PAGE_SHIFT, 0));
    return walk_and_free(root, err, walk);
}

/*
 * A guest of order-0 folios on its way through a live update, one folio at a time: pinned, entered
 * into the tree, described by a record; found again in the tree by the next kernel, and put from
 * its record into a file's page cache. Only the bookkeeping: no content, no locks, no allocator.
 */
enum {
    PIN = 1024,
    DIRTY_UPTODATE = 3,
    FLAGS_SHIFT = 52,
    CHUNK_ENTRIES = 511,
    CACHE_BITS = 6, /* slots of a page cache node, in log2 */
    CACHE_LEVELS = 6,
};

static const uint64_t MAGIC = UINT64_C(0x4b484f50) << 32;

struct page {
    uint64_t private;
    uint32_t refcount;
    uint32_t flags;
};

struct record {
    uint64_t pfn_and_flags;
    uint64_t index;
};

struct chunk {
    struct chunk *next;
    uint64_t phys[CHUNK_ENTRIES];
};

struct guest {
    uint64_t nr_folios;
    uint64_t index_sum;
    uint64_t nr_cache_nodes;
};

struct cache_node {
    void *slot[1 << CACHE_BITS];
};

static int preserve_guest(struct node *root, struct page *pages, struct record *records,
                          struct chunk *chunk, uint64_t nr_folios)
{
    uint64_t nr_record_pages = (nr_folios + 255) / 256;
    unsigned int used = 0;
    int err = 0;

    for (uint64_t pfn = 1; pfn <= nr_folios; pfn++)
        pages[pfn].refcount += PIN;
    for (uint64_t i = 0; !err && i < nr_folios; i++) {
        uint64_t pfn = i + 1;

        err = add_key(root, encode_key(pfn << PAGE_SHIFT, 0));
        pages[pfn].flags |= DIRTY_UPTODATE;
        records[i].pfn_and_flags = pfn | (uint64_t)DIRTY_UPTODATE << FLAGS_SHIFT;
        records[i].index = i;
    }
    for (uint64_t i = 0; !err && i < nr_record_pages; i++) {
        uint64_t phys = (nr_folios + 1 + i) << PAGE_SHIFT;

        err = add_key(root, encode_key(phys, 0));
        chunk->phys[used++] = phys;
        if (used == CHUNK_ENTRIES) {
            chunk->next = calloc(1, sizeof(struct chunk));
            chunk = chunk->next;
            used = 0;
            if (!chunk)
                return -1;
        }
    }
    return err;
}

static void mark_tree(const struct node *node, unsigned int level, uint64_t key,
                      struct page *pages)
{
    if (level > 0) {
        for (uint64_t i = 0; i < 1 << TABLE_BITS; i++)
            if (node->table[i])
                mark_tree(node->table[i], level - 1, key | (i << shift_of(level)), pages);
        return;
    }
    for (unsigned int i = 0; i < (1 << BITMAP_BITS) / 64; i++) {
        for (uint64_t word = node->bitmap[i]; word; word &= word - 1) {
            uint64_t bit = i * 64 + (unsigned int)__builtin_ctzll(word);

            pages[decode_phys(key | bit) >> PAGE_SHIFT].private = MAGIC;
        }
    }
}

static int restore_page(struct page *page)
{
    if (page->private != MAGIC)
        return -1;
    page->private = 0;
    page->refcount = 1;
    return 0;
}

static int store_in_cache(struct cache_node *root, uint64_t index, void *page, struct guest *guest)
{
    struct cache_node *node = root;

    for (unsigned int level = CACHE_LEVELS - 1; level > 0; level--) {
        void **slot = &node->slot[(index >> (level * CACHE_BITS)) & ((1 << CACHE_BITS) - 1)];

        if (!*slot) {
            *slot = calloc(1, sizeof(struct cache_node));
            guest->nr_cache_nodes++;
        }
        node = *slot;
        if (!node)
            return -1;
    }
    node->slot[index & ((1 << CACHE_BITS) - 1)] = page;
    return 0;
}

static int retrieve_guest(struct page *pages, const struct record *records,
                          const struct chunk *chunk, uint64_t nr_folios,
                          struct cache_node *cache, struct guest *guest)
{
    int err = 0;

    for (; chunk; chunk = chunk->next)
        for (unsigned int i = 0; i < CHUNK_ENTRIES && chunk->phys[i]; i++)
            err |= restore_page(&pages[chunk->phys[i] >> PAGE_SHIFT]);
    for (uint64_t i = 0; !err && i < nr_folios; i++) {
        uint64_t pfn = records[i].pfn_and_flags & ((UINT64_C(1) << FLAGS_SHIFT) - 1);

        err = restore_page(&pages[pfn]);
        if (!err)
            err = store_in_cache(cache, records[i].index, &pages[pfn], guest);
        pages[pfn].flags = (uint32_t)(records[i].pfn_and_flags >> FLAGS_SHIFT);
        guest->nr_folios++;
        guest->index_sum += records[i].index;
    }
    return err;
}

static void free_cache(struct cache_node *node, unsigned int level)
{
    if (level > 0)
        for (unsigned int i = 0; i < 1 << CACHE_BITS; i++)
            if (node->slot[i])
                free_cache(node->slot[i], level - 1);
    free(node);
}

int hand_over_guest(uint64_t nr_folios, struct guest *guest)
{
    uint64_t nr_pages = nr_folios + nr_folios / 256 + 3;
    struct page *pages = calloc(nr_pages, sizeof(struct page));
    struct page *successor = calloc(nr_pages, sizeof(struct page));
    struct record *records = calloc(nr_folios + 1, sizeof(struct record));
    struct chunk *chunks = calloc(1, sizeof(struct chunk));
    struct cache_node *cache = calloc(1, sizeof(struct cache_node));
    struct node *root = new_node();
    int err = !pages || !successor || !records || !chunks || !cache || !root;

    *guest = (struct guest){0};
    if (!err)
        err = preserve_guest(root, pages, records, chunks, nr_folios);
    if (!err)
        mark_tree(root, ROOT_LEVEL, 0, successor);
    if (!err)
        err = retrieve_guest(successor, records, chunks, nr_folios, cache, guest);
    if (root)
        free_tree(root, ROOT_LEVEL);
    if (cache)
        free_cache(cache, CACHE_LEVELS - 1);
    while (chunks) {
        struct chunk *next = chunks->next;

        free(chunks);
        chunks = next;
    }
    free(pages);
    free(successor);
    free(records);
    return err;
}
