//! A processor: one thread that runs the guest and carries its exits to the devices. All that runs
//! here must be thought of as driven by hostile code (the guest's).

use std::{io, sync::Arc, thread};

use parking_lot::{Mutex, MutexGuard};

use kvm_bindings::KVM_SYSTEM_EVENT_CRASH;
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::end::End;
use crate::control::EndReason;
use crate::devices::{
    bus::Bus,
    uart::{self, Uart},
};

/// `KVM_INTERNAL_ERROR_EMULATION`: KVM met an instruction that it had to emulate and could not.
const EMULATION_FAILED: u32 = 1;

/// What the processors share.
#[derive(Debug)]
pub(crate) struct Peripherals {
    /// The devices in memory space.
    pub(crate) bus: Bus,
    /// The early console.
    pub(crate) uart: Mutex<Uart>,
}

/// Runs `vcpu` on a thread of its own until the machine ends.
pub(crate) fn start(index: usize, mut vcpu: VcpuFd, peripherals: Arc<Peripherals>, end: Arc<End>) -> io::Result<()> {
    thread::Builder::new()
        .name(format!("vcpu {index}"))
        .stack_size(128 << 10)
        .spawn(move || {
            let reason = run(&mut vcpu, &peripherals);
            end.report(reason);
        })?;
    Ok(())
}

fn run(vcpu: &mut VcpuFd, peripherals: &Peripherals) -> EndReason {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::MmioRead(address, data)) => peripherals.bus.read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => peripherals.bus.write(address, data),
            Ok(VcpuExit::IoIn(port, data)) => {
                data.fill(0xff);
                if let (Some(offset), [value]) = (uart_register(port), data) {
                    *value = lock(&peripherals.uart).read(offset);
                }
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                if let Some(offset) = uart_register(port) {
                    let mut uart = lock(&peripherals.uart);
                    for value in data {
                        uart.write(offset, *value);
                    }
                }
            }
            Ok(VcpuExit::Shutdown) => return EndReason::GuestReset,
            Ok(VcpuExit::SystemEvent(kind, _)) if kind != KVM_SYSTEM_EVENT_CRASH => return EndReason::GuestReset,
            Ok(VcpuExit::InternalError) => return internal_error(vcpu),
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                return EndReason::KvmFailed(format!(
                    "the processor refused to enter the guest (hardware reason {reason:#x} on CPU {cpu})"
                ));
            }
            Ok(VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => {}
            Ok(other) => return EndReason::KvmFailed(format!("an exit that no guest of ours causes: {other:?}")),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => return EndReason::KvmFailed(format!("KVM_RUN: {}", io::Error::from(error))),
        }
    }
}

fn uart_register(port: u16) -> Option<u8> {
    let offset = port.checked_sub(uart::BASE).filter(|offset| *offset < uart::PORTS)?;
    u8::try_from(offset).ok()
}

fn lock(uart: &Mutex<Uart>) -> MutexGuard<'_, Uart> {
    uart.lock()
}

/// Says in one line what KVM could not do, and names the hosts on which no guest runs at all.
fn internal_error(vcpu: &mut VcpuFd) -> EndReason {
    let run = vcpu.get_kvm_run();
    // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, for which `internal` is the live member
    // of the union; its fields are plain integers.
    let (suberror, length, data) = unsafe {
        let internal = run.__bindgen_anon_1.internal;
        (internal.suberror, internal.ndata, internal.data)
    };
    let words = data.iter().take(length.min(16) as usize);
    let words: Vec<String> = words.map(|word| format!("{word:x}")).collect();
    let address = vcpu.get_regs().map_or(0, |regs| regs.rip);
    EndReason::KvmFailed(if suberror == EMULATION_FAILED {
        format!(
            "this host's KVM cannot run Linux guests: it emulates the guest's kernel instead of running it on the \
             processor, and does not know the instruction at {address:#x} (emulation data {}); use a host with VT-x \
             or AMD-V, or one whose hypervisor passes them on",
            words.join(" ")
        )
    } else {
        format!("internal error {suberror} at {address:#x} (data {})", words.join(" "))
    })
}
