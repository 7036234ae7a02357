// Package uki makes the one file that the firmware starts, and says what the
// TPM will hold after that start.
//
// A unified kernel image (UKI) is systemd's EFI program with the kernel, the
// initramfs and the command line as further PE sections [Build]. It is signed
// for Secure Boot [Sign] with keys of this organisation alone [Keys], which
// [SecureBoot.Variables] places into a virtual machine's firmware. [Predict]
// computes the PCR values of a boot from these files: nothing is learned from
// a boot, a boot only tests the rules.
//
// The package does no I/O but for reading and writing keys. Images are handled
// in memory, with [MaxImage] as the limit.
package uki
