"""The ``khosim`` command: :mod:`khosim.cli.main` and one module per subcommand."""
