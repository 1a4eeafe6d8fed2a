//! Small real guests for tests and the demo, and an oracle for the content of their disks.
