"""The door: files become images, points and transforms in RAS+ mm, and back. Importing this loads no codec; nibabel,
isal and SimpleITK load with the first file that needs them."""

from regkit.io.images import read_image, write_image
from regkit.io.output import output_file, output_folder, sha256
from regkit.io.points import Points, read_points, write_points
from regkit.io.transforms import read_field, read_transform, write_field, write_transform

__all__ = [
    "Points", "output_file", "output_folder", "read_field", "read_image", "read_points", "read_transform", "sha256",
    "write_field", "write_image", "write_points", "write_transform",
]
