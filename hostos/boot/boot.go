// Package boot is PID 1 of the host domain: it mounts, loads modules, sees to
// the closed ruleset before any network device exists, and supervises the
// services of docs/host-domain.md with the systemd service protocol.
package boot
