//! The guest that this executable carries: kernel and initramfs, and where they lie in the file.
