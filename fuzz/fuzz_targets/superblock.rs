#![no_main]

use nutshell_disk_reader::fuzz::identify_disk;

libfuzzer_sys::fuzz_target!(|data: &[u8]| identify_disk(data));
