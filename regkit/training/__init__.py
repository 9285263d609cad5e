"""Training localisation nets: random poses, pictures of changed contrast, and the loop."""
