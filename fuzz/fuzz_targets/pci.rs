#![no_main]

use nutshell::fuzz::access_pci;

libfuzzer_sys::fuzz_target!(|data: &[u8]| access_pci(data));
