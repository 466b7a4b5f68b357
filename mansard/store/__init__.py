"""The store: content named by its digest, in a folder or a bucket; what made it; and how it goes again."""
