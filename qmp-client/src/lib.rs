//! QEMU's monitor (QMP) and guest agent (QGA) protocols over a Unix socket.
