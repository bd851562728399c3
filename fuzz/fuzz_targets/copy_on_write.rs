#![no_main]

use nutshell_disk_image::fuzz::change_disk;

libfuzzer_sys::fuzz_target!(|data: &[u8]| change_disk(data));
