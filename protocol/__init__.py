"""What peers agree on: documents, codecs, merging, exchange. Imports none of the other packages."""
