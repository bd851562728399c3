#![no_main]

use nutshell::fuzz::serve_disk;

libfuzzer_sys::fuzz_target!(|data: &[u8]| serve_disk(data));
