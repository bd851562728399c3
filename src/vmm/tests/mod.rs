//! Tests with unmodified kernels on the PC board. They need a /dev/kvm that can boot those: `tests/pc/run-in-lab` runs
//! them.

mod guest;
mod pc;
