//! Devices that the guest sees. Each is driven by the vmm's event loop or by a worker of its own
//! and touches no host resource but the descriptors that it was made with.
