//! Tests with unmodified kernels on the PC board. They need a KVM that boots any kernel: `tests/pc/run-in-lab` runs
//! them.

mod guest;
mod pc;
