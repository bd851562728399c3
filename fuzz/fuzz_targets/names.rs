#![no_main]

use nutshell_disk_reader::fuzz::compare_names;

libfuzzer_sys::fuzz_target!(|data: &[u8]| compare_names(data));
