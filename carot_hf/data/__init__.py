"""Sets and suites of images, and how they become batches."""
