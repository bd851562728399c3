//! Encodes eBPF instructions (Linux, `Documentation/bpf/standardization/instruction-set.rst`).
//!
//! Registers are numbers from 0 to 10: 0 holds the result, 1 to 5 hold arguments, 10 is the frame pointer. The
//! `32` and `64` in a name are the width in bits; 32-bit operations clear the upper half of their destination.
//! Jumps are relative: `over` is the number of instructions to skip.

/// One instruction: `struct bpf_insn` of `linux/bpf.h`, as bpf(2) requires it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    /// The operation.
    pub code: u8,
    /// The destination register in the low four bits, the source register in the high four bits.
    pub registers: u8,
    /// The offset of a memory access, in bytes, or of a jump, in instructions.
    pub offset: i16,
    /// The constant operand.
    pub immediate: i32,
}

impl Instruction {
    const fn new(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Self {
        Self {
            code,
            registers: destination | (source << 4),
            offset,
            immediate,
        }
    }

    /// `destination = *(u32 *)(source + offset)`
    #[must_use]
    pub const fn load32(destination: u8, source: u8, offset: i16) -> Self {
        Self::new(0x61, destination, source, offset, 0)
    }

    /// `*(u32 *)(destination + offset) = source`
    #[must_use]
    pub const fn store32(destination: u8, offset: i16, source: u8) -> Self {
        Self::new(0x63, destination, source, offset, 0)
    }

    /// `destination = map`, where `map` is the descriptor of a BPF map. This takes two instructions.
    #[must_use]
    pub const fn load_map(destination: u8, map: i32) -> [Self; 2] {
        /// `BPF_PSEUDO_MAP_FD`, in place of a source register.
        const MAP_DESCRIPTOR: u8 = 1;
        [
            Self::new(0x18, destination, MAP_DESCRIPTOR, 0, map),
            Self::new(0, 0, 0, 0, 0),
        ]
    }

    /// `destination = source`
    #[must_use]
    pub const fn copy32(destination: u8, source: u8) -> Self {
        Self::new(0xbc, destination, source, 0, 0)
    }

    /// `destination = source`
    #[must_use]
    pub const fn copy64(destination: u8, source: u8) -> Self {
        Self::new(0xbf, destination, source, 0, 0)
    }

    /// `destination = value`
    #[must_use]
    pub const fn set32(destination: u8, value: i32) -> Self {
        Self::new(0xb4, destination, 0, 0, value)
    }

    /// `destination = value`, sign-extended
    #[must_use]
    pub const fn set64(destination: u8, value: i32) -> Self {
        Self::new(0xb7, destination, 0, 0, value)
    }

    /// `destination += value`, sign-extended
    #[must_use]
    pub const fn add64(destination: u8, value: i32) -> Self {
        Self::new(0x07, destination, 0, 0, value)
    }

    /// `destination &= mask`
    #[must_use]
    pub const fn and32(destination: u8, mask: i32) -> Self {
        Self::new(0x54, destination, 0, 0, mask)
    }

    /// `destination &= mask`, sign-extended
    #[must_use]
    pub const fn and64(destination: u8, mask: i32) -> Self {
        Self::new(0x57, destination, 0, 0, mask)
    }

    /// `destination >>= bits`, filling with zeros
    #[must_use]
    pub const fn shift_right32(destination: u8, bits: i32) -> Self {
        Self::new(0x74, destination, 0, 0, bits)
    }

    /// Jumps unconditionally.
    #[must_use]
    pub const fn jump(over: i16) -> Self {
        Self::new(0x05, 0, 0, over, 0)
    }

    /// Jumps if `register` equals `value`, sign-extended.
    #[must_use]
    pub const fn jump_if_equal64(register: u8, value: i32, over: i16) -> Self {
        Self::new(0x15, register, 0, over, value)
    }

    /// Jumps if the low half of `register` does not equal `value`.
    #[must_use]
    pub const fn jump_if_not_equal32(register: u8, value: i32, over: i16) -> Self {
        Self::new(0x56, register, 0, over, value)
    }

    /// Jumps if `register` does not equal `value`, sign-extended.
    #[must_use]
    pub const fn jump_if_not_equal64(register: u8, value: i32, over: i16) -> Self {
        Self::new(0x55, register, 0, over, value)
    }

    /// Calls the kernel's helper function `function` (`enum bpf_func_id`).
    #[must_use]
    pub const fn call(function: i32) -> Self {
        Self::new(0x85, 0, 0, 0, function)
    }

    /// Ends the program; its result is in register 0.
    #[must_use]
    pub const fn exit() -> Self {
        Self::new(0x95, 0, 0, 0, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instruction_has_the_kernels_layout() {
        assert_eq!(size_of::<Instruction>(), 8);
        let store = Instruction::store32(10, -4, 7);
        assert_eq!(
            (store.code, store.registers, store.offset, store.immediate),
            (0x63, 0x7a, -4, 0)
        );
    }

    #[test]
    fn map_takes_two_instructions() {
        let [low, high] = Instruction::load_map(1, 9);
        assert_eq!((low.code, low.registers, low.immediate), (0x18, 0x11, 9));
        assert_eq!(high, Instruction::new(0, 0, 0, 0, 0));
    }
}
