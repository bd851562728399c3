#![no_main]

use nutshell_disk_reader::fuzz::parse_kernel_image;

libfuzzer_sys::fuzz_target!(|data: &[u8]| parse_kernel_image(data));
