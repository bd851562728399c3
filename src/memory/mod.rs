//! Guest memory: its layout in guest physical address space, the host mappings behind it, and the table of regions that
//! devices use.
//!
//! Does not belong here: anything about the users of memory. [`crate::vmm`] allocates and grows it, [`crate::devices`]
//! read and write it. No other module maps guest memory.

mod backing_file;
mod error;
mod layout;
mod load;
mod mapping;
mod regions;

pub(crate) use self::{
    backing_file::{create_huge_page_file, create_sealed_file},
    error::MemoryError,
    layout::{DEVICE_WINDOW, HUGE_PAGE_SIZE, ram_ranges},
    load::{ExpectedAccess, Extent, load_file},
    mapping::{add_region, advise_huge_pages, allocate},
    regions::{GuestMemory, MemoryRegions},
};
