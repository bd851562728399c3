#![no_main]

use nutshell::fuzz::receive_disk_kernel;

libfuzzer_sys::fuzz_target!(|data: &[u8]| receive_disk_kernel(data));
