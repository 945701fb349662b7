"""What setup.cfg, which has all the rest, cannot say: the source archive has the link abi_py/kernels, not copies."""

import os

from setuptools import setup
from setuptools.command.sdist import sdist


class SourceArchive(sdist):
    """The files of MANIFEST.in, and the link by which a tree that is not installed finds abi_py.kernels."""

    def make_release_tree(self, base_dir, files):
        """Lay out the archive's tree."""
        super().make_release_tree(base_dir, [name for name in files if not name.startswith("abi_py/kernels")])
        link = os.path.join(base_dir, "abi_py", "kernels")
        if os.path.lexists(link):  # of an earlier tree, kept by --keep-temp
            os.unlink(link)
        os.symlink(os.path.join(os.pardir, "kernels"), link)


setup(cmdclass={"sdist": SourceArchive})
