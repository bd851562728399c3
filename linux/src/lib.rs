//! Linux details that both the host's executable and the guest's agent need: BPF instructions and programs, mount
//! options, the standard streams of hooks, and Go's error texts.
//!
//! Only code that is the same on both sides belongs here, and nothing that is specific to nutshell. The agent
//! is unpacked into guest memory at every boot, so this crate stays small.

pub mod bpf;
pub mod bpf_program;
pub mod go_text;
pub mod hook;
pub mod mount_options;
pub mod sk_lookup;
