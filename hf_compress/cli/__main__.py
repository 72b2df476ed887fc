"""`python -m hf_compress.cli`, for launchers of several processes."""

from hf_compress.cli.main import main

if __name__ == "__main__":
    main()
