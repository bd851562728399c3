#![no_main]

use nutshell::fuzz::serve_files;

libfuzzer_sys::fuzz_target!(|data: &[u8]| serve_files(data));
