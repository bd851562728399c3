#![no_main]

use nutshell::fuzz::access_pc_board;

libfuzzer_sys::fuzz_target!(|data: &[u8]| access_pc_board(data));
