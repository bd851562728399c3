#![no_main]

use nutshell_disk_image::fuzz::read_qcow2;

libfuzzer_sys::fuzz_target!(|data: &[u8]| read_qcow2(data));
