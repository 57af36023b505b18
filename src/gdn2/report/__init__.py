"""One HTML page that compares runs and the rows of experiments (`gdn2 report`)."""
