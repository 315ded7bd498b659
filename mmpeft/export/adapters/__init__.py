"""Adapters as files: listed, compared, averaged, combined, and converted from other programs' layouts."""
