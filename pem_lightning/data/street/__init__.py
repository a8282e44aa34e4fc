"""Drawing of the embedded data set's street scenes."""
