"""What RefAlign is (arXiv 2603.25743): losses, alignment and teachers. Imports torch and refalign alone."""
