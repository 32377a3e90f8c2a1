"""The tour's page: one HTML file that shows matrices, and answers when it is touched."""

from curvops.tour.page.write import PAGE_BYTES, write_page

__all__ = ["PAGE_BYTES", "write_page"]
