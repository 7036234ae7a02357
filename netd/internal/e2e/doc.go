// Package e2e tests netd and the gateway as people run them: two programs in
// real network namespaces, a home router with a DHCP server before them, a
// page on LGWAN behind them, and a capture of the uplink from the first frame.
package e2e
