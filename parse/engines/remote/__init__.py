"""An engine whose model runs in another server, reached over HTTP or in another way."""
