"""Real data: images, data sets, arrays and loaders, read in blocks of rows."""
