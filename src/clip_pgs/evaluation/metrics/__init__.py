"""What is measured on the features of a data set."""
