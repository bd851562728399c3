#![no_main]

use nutshell::fuzz::serve_devices;

libfuzzer_sys::fuzz_target!(|data: &[u8]| serve_devices(data));
