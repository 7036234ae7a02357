package boot

// Module is one kernel module that init loads, by the name modprobe knows.
// What a module depends on is not listed: modules.dep says that.
type Module struct {
	// Name is the module's name with underscores.
	Name string
	// CPU restricts the module to one vendor_id of /proc/cpuinfo; empty means
	// every CPU. An image holds the modules of every vendor.
	CPU string
	// Serves says what cannot work without the module; empty for a module
	// whose absence is only worth a warning, because it may drive hardware
	// that this machine does not have.
	Serves string
}

// What a required module serves, when it is neither in the image nor in the
// kernel: without the ruleset init stops, closed; without the work domain's it
// does not start QEMU; without tun, linkd and netd cannot start, so nothing opens.
const (
	ServesRuleset    = "ruleset"     // netd close, hence everything after it
	ServesWorkDomain = "work domain" // QEMU with KVM and vsock
)

// BaseModules lists what is loaded before the ruleset is closed, in order. No
// network device driver is among them.
func BaseModules() []Module {
	return []Module{
		// libcrc32c, which nf_tables needs, asks for this by softdep only.
		{Name: "crc32c_generic"},
		{Name: "nf_tables", Serves: ServesRuleset},
		{Name: "nf_conntrack"},
		{Name: "nft_ct"},
		{Name: "tun"},
		{Name: "veth"},

		{Name: "virtio_pci"},
		{Name: "virtio_blk"},
		{Name: "virtio_scsi"},
		{Name: "virtio_console"},
		{Name: "ahci"},
		{Name: "nvme"},
		{Name: "sd_mod"},

		// The work domain's disk: hardware's AES if there is any, then dm-crypt
		// with what it asks the crypto API for by name.
		{Name: "aesni_intel"},
		{Name: "xts"},
		{Name: "dm_crypt", Serves: ServesWorkDomain},
		{Name: "dm_snapshot"},

		{Name: "tpm_crb"},
		{Name: "tpm_tis"},
		{Name: "efivarfs"},

		{Name: "kvm_amd", CPU: "AuthenticAMD", Serves: ServesWorkDomain},
		{Name: "kvm_intel", CPU: "GenuineIntel", Serves: ServesWorkDomain},
		{Name: "vhost_vsock", Serves: ServesWorkDomain},
	}
}

// NICModules lists the network device drivers. They are loaded only after the
// closed ruleset is in force in both namespaces. The USB family is thin on
// purpose: Ethernet and tethering that need no firmware.
func NICModules() []Module {
	return []Module{
		{Name: "virtio_net"},
		{Name: "e1000e"},
		{Name: "igc"},
		{Name: "realtek"}, // PHY driver that r8169 asks for by softdep only
		{Name: "r8169"},
		{Name: "xhci_pci"},
		{Name: "usbnet"},
		{Name: "cdc_ether"},
		{Name: "cdc_ncm"},
		{Name: "rndis_host"},
		{Name: "r8152"},
		{Name: "ax88179_178a"},

		// Wi-Fi. Ciphers of mac80211 that it asks for by name only. Debian's main
		// archive has no firmware for most cards; netd says which one wants some.
		{Name: "ccm"},
		{Name: "gcm"},
		{Name: "cmac"},
		{Name: "mac80211"},
		{Name: "ath9k"},
		{Name: "iwlwifi"},
	}
}
