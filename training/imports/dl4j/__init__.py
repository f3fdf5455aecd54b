"""DL4J's saved networks (ModelSerializer zips): the archive, its arrays, its dialects, its layers."""
