#![no_main]

use nutshell_disk_reader::fuzz::search_disk;

libfuzzer_sys::fuzz_target!(|data: &[u8]| search_disk(data));
