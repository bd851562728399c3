#![no_main]

use nutshell::fuzz::serve_vmm;

libfuzzer_sys::fuzz_target!(|data: &[u8]| serve_vmm(data));
