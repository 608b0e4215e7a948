//! The ports and interrupt lines of the machine, in one place.

/// First port of the serial port, where PCs have COM1.
pub const SERIAL: u16 = 0x3f8;
/// Ports of the serial port.
pub const SERIAL_PORTS: u16 = 8;
/// Interrupt line of the serial port.
pub const SERIAL_LINE: u32 = 4;

/// Interrupt line by which the guest is told that its generation has changed.
pub const GENERATION_LINE: u32 = 5;

/// Interrupt line by which the guest is told of PCI functions that come and go.
pub const HOT_PLUG_LINE: u32 = 10;
/// First port of the registers that say which.
pub const HOT_PLUG: u16 = 0x620;

/// pvpanic's port, where QEMU has it.
pub const PANIC: u16 = 0x505;

/// PM1 status (2 bytes) and enable (2 bytes).
pub const PM1_EVENT: u16 = 0x600;
/// Bytes of the above.
pub const PM1_EVENT_BYTES: u8 = 4;
/// PM1 control.
pub const PM1_CONTROL: u16 = 0x604;
/// Bytes of the above.
pub const PM1_CONTROL_BYTES: u8 = 2;
/// Interrupt line of ACPI's events.
pub const SCI_LINE: u32 = 9;
/// The sleep type that turns the machine off (S5).
pub const SLEEP_TYPE_OFF: u16 = 5;

/// The reset register. It lies inside of PCI's configuration ports, which take 4 bytes there.
pub const RESET: u16 = 0xcf9;
/// What is written there to reset: full reset, with the reset bit.
pub const RESET_VALUE: u8 = 0x06;
/// The reset bit alone decides.
pub const RESET_BIT: u8 = 0x04;

/// The keyboard controller's command port, through which PCs were reset.
pub const KEYBOARD_COMMAND: u16 = 0x64;
/// The command that pulses the reset line.
pub const KEYBOARD_RESET: u8 = 0xfe;
