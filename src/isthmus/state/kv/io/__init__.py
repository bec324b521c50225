"""The block store's disk: aligned transfers in flight through io_uring or threads, past the page cache."""
