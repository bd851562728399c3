//! The events between devices and the guest: ioeventfds, irqfds on interrupt lines, and messages (MSI).

use std::{collections::BTreeMap, io, sync::Arc};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::error::{KvmError, check};
use crate::{
    devices::{
        pci::msix::{Message, MessageVector},
        virtio::transport::pci::Doorbells,
    },
    vmm::boot::mptable::IO_APIC_LINES,
};

/// The number of lines of each of the two legacy interrupt controllers (PIC).
const PIC_LINES: u8 = 8;

/// The maximum number of messages. KVM allows 4096 routes in total (`KVM_MAX_IRQ_ROUTES`).
const MAX_MESSAGES: u32 = 2048;

/// Connects eventfds to a virtual machine.
#[derive(Debug, Clone)]
pub(in crate::vmm) struct VmEvents {
    vm: Arc<VmFd>,
    /// The messages by their number (GSI) in KVM's routing table. `None` for a vector that was never connected.
    messages: Arc<Mutex<BTreeMap<u32, Option<Message>>>>,
}

impl VmEvents {
    pub(super) fn new(vm: Arc<VmFd>) -> Self {
        Self {
            vm,
            messages: Arc::default(),
        }
    }

    /// Makes KVM signal `event` when the guest writes the 32-bit `value` to `address`, without an exit to this process.
    pub(in crate::vmm) fn register_ioeventfd(&self, event: &EventFd, address: u64, value: u32) -> Result<(), KvmError> {
        let address = IoEventAddress::Mmio(address);
        check("adding an ioeventfd", self.vm.register_ioevent(event, &address, value))
    }

    /// Makes KVM signal `event` when the guest writes the 16-bit `value` to the I/O port `port`, without an exit to this
    /// process.
    pub(in crate::vmm) fn register_port_ioeventfd(
        &self,
        event: &EventFd,
        port: u16,
        value: u16,
    ) -> Result<(), KvmError> {
        let address = IoEventAddress::Pio(port.into());
        check("adding an ioeventfd", self.vm.register_ioevent(event, &address, value))
    }

    /// Makes KVM raise interrupt line `line` when `event` is signalled.
    pub(in crate::vmm) fn register_irqfd(&self, event: &EventFd, line: u32) -> Result<(), KvmError> {
        check("adding an irqfd", self.vm.register_irqfd(event, line))
    }

    /// Returns a vector for a device's messages, which is not connected yet.
    pub(in crate::vmm) fn create_vector(&self) -> io::Result<Box<dyn MessageVector>> {
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let mut messages = self.messages.lock();
        let first = u32::from(IO_APIC_LINES);
        let gsi = (first..first + MAX_MESSAGES).find(|gsi| !messages.contains_key(gsi));
        let gsi = gsi.ok_or_else(|| {
            io::Error::other(format!(
                "the devices need more than {MAX_MESSAGES} interrupt vectors: give the machine fewer disks or vCPUs"
            ))
        })?;
        messages.insert(gsi, None);
        Ok(Box::new(RoutedVector {
            events: self.clone(),
            gsi,
            event,
            is_registered: false,
        }))
    }

    /// Returns the notification addresses of a device with these kicks.
    pub(in crate::vmm) fn create_doorbells(&self, kicks: &[EventFd]) -> io::Result<Box<dyn Doorbells>> {
        Ok(Box::new(IoEvents {
            vm: self.vm.clone(),
            kicks: kicks.iter().map(EventFd::try_clone).collect::<Result<_, _>>()?,
            addresses: Vec::new(),
        }))
    }

    /// Changes the message of `gsi`. KVM cannot change a single route, so this replaces the whole routing table: KVM's
    /// default routes of the interrupt lines, and the routes of all messages.
    fn set_message(&self, gsi: u32, message: Message) -> io::Result<()> {
        let mut messages = self.messages.lock();
        if messages.get(&gsi) == Some(&Some(message)) {
            return Ok(());
        }
        let previous = messages.insert(gsi, Some(message)).flatten();
        let result = self.set_routes(&messages);
        if result.is_err() {
            // KVM has kept the old table. The refused message must not stay: KVM would refuse each later table with it.
            messages.insert(gsi, previous);
        }
        result
    }

    fn set_routes(&self, messages: &BTreeMap<u32, Option<Message>>) -> io::Result<()> {
        let connected = messages.iter().filter_map(|(gsi, message)| Some((*gsi, (*message)?)));
        let routes: Vec<_> = line_routes().chain(connected.map(message_route)).collect();
        let routes = KvmIrqRouting::from_entries(&routes).map_err(|_| io::Error::other("too many interrupt routes"))?;
        Ok(self.vm.set_gsi_routing(&routes)?)
    }
}

/// The routes of the interrupt lines that KVM creates with the interrupt controllers.
fn line_routes() -> impl Iterator<Item = kvm_irq_routing_entry> {
    let route = |line: u8, irqchip, pin: u8| {
        let mut entry = kvm_irq_routing_entry {
            gsi: line.into(),
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            ..kvm_irq_routing_entry::default()
        };
        entry.u.irqchip = kvm_irq_routing_irqchip {
            irqchip,
            pin: pin.into(),
        };
        entry
    };
    let legacy = (0..2 * PIC_LINES).map(move |line| {
        if line < PIC_LINES {
            route(line, KVM_IRQCHIP_PIC_MASTER, line)
        } else {
            route(line, KVM_IRQCHIP_PIC_SLAVE, line - PIC_LINES)
        }
    });
    legacy.chain((0..IO_APIC_LINES).map(move |line| route(line, KVM_IRQCHIP_IOAPIC, line)))
}

fn message_route((gsi, message): (u32, Message)) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..kvm_irq_routing_entry::default()
    };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: (message.address & 0xffff_ffff) as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..kvm_irq_routing_msi::default()
    };
    entry
}

/// A vector with a number (GSI) in KVM's routing table. While it is connected, its eventfd is an irqfd of that number.
struct RoutedVector {
    events: VmEvents,
    gsi: u32,
    event: EventFd,
    is_registered: bool,
}

impl MessageVector for RoutedVector {
    fn connect(&mut self, message: Message) -> io::Result<()> {
        if let Err(error) = self.events.set_message(self.gsi, message) {
            let _ = self.disconnect();
            return Err(error);
        }
        if !self.is_registered {
            // If the eventfd was signalled before, KVM delivers that signal now.
            self.events.vm.register_irqfd(&self.event, self.gsi)?;
            self.is_registered = true;
        }
        Ok(())
    }

    fn disconnect(&mut self) -> io::Result<()> {
        if self.is_registered {
            self.events.vm.unregister_irqfd(&self.event, self.gsi)?;
            self.is_registered = false;
        }
        Ok(())
    }

    fn event(&self) -> &EventFd {
        &self.event
    }
}

impl Drop for RoutedVector {
    fn drop(&mut self) {
        match self.disconnect() {
            Ok(()) => drop(self.events.messages.lock().remove(&self.gsi)),
            // The GSI stays allocated, because its irqfd may still exist.
            Err(error) => log::warn!(target: "virtual machine", "cannot remove the irqfd of a device: {error}"),
        }
    }
}

/// Doorbells by ioeventfds, which match a write of any width and value.
struct IoEvents {
    vm: Arc<VmFd>,
    kicks: Vec<EventFd>,
    /// The queue index and the address of each registered ioeventfd.
    addresses: Vec<(usize, u64)>,
}

impl Doorbells for IoEvents {
    fn move_to(&mut self, start: Option<u64>, step: u64) -> io::Result<()> {
        let mut result = Ok(());
        for (queue, address) in std::mem::take(&mut self.addresses) {
            let kick = &self.kicks[queue];
            let removed = self
                .vm
                .unregister_ioevent(kick, &IoEventAddress::Mmio(address), NoDatamatch);
            result = result.and(removed);
        }
        let Some(start) = start else {
            return Ok(result?);
        };
        for (queue, kick) in self.kicks.iter().enumerate() {
            let address = start + queue as u64 * step;
            match self
                .vm
                .register_ioevent(kick, &IoEventAddress::Mmio(address), NoDatamatch)
            {
                Ok(()) => self.addresses.push((queue, address)),
                Err(error) => result = result.and(Err(error)),
            }
        }
        Ok(result?)
    }
}

impl Drop for IoEvents {
    fn drop(&mut self) {
        if let Err(error) = self.move_to(None, 0) {
            log::warn!(target: "virtual machine", "cannot remove the ioeventfds of a device: {error}");
        }
    }
}
