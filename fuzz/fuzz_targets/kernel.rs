#![no_main]

use nutshell::fuzz::load_kernel;

libfuzzer_sys::fuzz_target!(|data: &[u8]| load_kernel(data));
