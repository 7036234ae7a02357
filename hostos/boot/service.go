package boot

import (
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"sekisho/attest"
	"sekisho/guestlink"
)

// Paths of the contract in docs/host-domain.md.
const (
	RunDir        = "/run/sekisho"
	InsideNetns   = "/run/netns/inside"
	InitSocket    = RunDir + "/init.sock"
	NotifySocket  = RunDir + "/notify.sock"
	LogDir        = RunDir + "/log"
	AttestdSocket = RunDir + "/attestd.sock"
	NetdSocket    = RunDir + "/netd.sock"
	LinkdSocket   = RunDir + "/linkd.sock"
	NetdDir       = RunDir + "/netd" // saved networks, network identity
	WPADir        = RunDir + "/wpa"  // control sockets of wpa_supplicant
	LinkDir       = RunDir + "/link" // linkd's, and nobody but the vmm enters it
	SerialSocket  = LinkDir + "/serial.sock"
	LogindSocket  = RunDir + "/logind.sock"
	LoginDir      = RunDir + "/login" // logind's, and nobody but the vmm enters it
	CardSocket    = LoginDir + "/card.sock"
	WorkConsole   = RunDir + "/work-console.log"
	TPMDevice     = "/dev/tpmrm0"
	StatePart     = "sekisho-state"
	HostPart      = "sekisho-host"    // what init remembers: hostos/store
	WorkPart      = "sekisho-work"    // the work domain's disk, encrypted: hostos/disk
	FactoryPart   = "sekisho-factory" // the work domain as it was delivered
	ScratchPart   = "sekisho-scratch" // for an ephemeral work domain; may be absent
	byPartlabel   = "/dev/disk/by-partlabel"
)

// User is an account of the host domain. Its group has the same name and
// number. The image's /etc/passwd and /etc/group are made from Users.
type User struct {
	Name   string
	ID     uint32
	Groups []string // further groups, by name
}

// notifyGroup may write to the notify socket.
const notifyGroup = "notify"

// vmmID is the user of QEMU, whom logind lets in.
const vmmID = 104

// wpaID is also the group that may use wpa_supplicant's control sockets.
const wpaID = 110

// Users lists the accounts beside root. Nothing runs as the user notifyGroup.
func Users() []User {
	return []User{
		{Name: "attestd", ID: 101, Groups: []string{notifyGroup}},
		{Name: "netd", ID: 102, Groups: []string{"attestd", "linkd", "wpa", notifyGroup}},
		{Name: "linkd", ID: 103, Groups: []string{notifyGroup}},
		{Name: "vmm", ID: vmmID},
		{Name: notifyGroup, ID: 105},
		{Name: "wpa", ID: wpaID},
		{Name: "logind", ID: 111, Groups: []string{"attestd", notifyGroup}},
	}
}

// lookup returns the ids of a user and its further groups. The name "" is root.
func lookup(name string) (id uint32, groups []uint32) {
	users := Users()
	find := func(name string) uint32 {
		i := slices.IndexFunc(users, func(u User) bool { return u.Name == name })
		if i < 0 {
			panic("boot: no user " + name) // the table below is tested to name only users above
		}
		return users[i].ID
	}
	if name == "" {
		return 0, nil
	}
	for _, u := range users {
		if u.Name == name {
			for _, g := range u.Groups {
				groups = append(groups, find(g))
			}
		}
	}
	return find(name), groups
}

// Service is one supervised program.
type Service struct {
	Name     string
	Args     []string      // Args[0] is the absolute path of the program
	User     string        // empty is root
	Caps     []uintptr     // ambient capabilities; with User empty the program has all
	Netns    string        // path of a network namespace, empty is outside
	NewNetns bool          // run in an empty network namespace of its own
	Dir      string        // made for the service before it starts, for it and its group
	Socket   string        // API socket that init opens and passes as LISTEN_FDS
	Notify   bool          // speaks READY=1; killed when it does not within startTimeout
	Watchdog time.Duration // longest silence between two WATCHDOG=1, 0 is for ever
	Log      string        // file for its output; empty is LogDir/Name.log
	Started  func()        // called at each start of the program; must not wait; may be nil
}

// watchdog is how long a daemon may be silent.
const watchdog = 30 * time.Second

// Services is the table of docs/host-domain.md, in the order of starting. link
// is the way of the guest link, as in attest.WorkDomain.
func Services(link string) []Service {
	const config = attest.OrganizationFile
	linkd := []string{"/bbin/linkd", "-cid", strconv.Itoa(guestlink.WorkCID), "-tun", guestlink.WorkLink}
	if link == attest.LinkSerial {
		linkd = append(linkd, "-serial", SerialSocket)
	}
	return append([]Service{
		{
			// Debian's wpa_supplicant: it waits for netd to give it links.
			Name: "wpa",
			Args: []string{"/usr/sbin/wpa_supplicant", "-g", WPADir + "/global", "-G", strconv.Itoa(wpaID)},
			User: "wpa", Caps: []uintptr{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW}, Dir: WPADir,
		},
		{
			Name: "attestd",
			Args: []string{"/bbin/attestd", "-config", config, "-tpm", TPMDevice, "-state", byPartlabel + "/" + StatePart, "-events", EventsFile},
			User: "attestd", Socket: AttestdSocket, Notify: true, Watchdog: watchdog,
		},
		{
			Name: "netd",
			Args: []string{"/bbin/netd", "run", "-config", config, "-attestd", AttestdSocket, "-linkd", LinkdSocket, "-inside", InsideNetns, "-wpa", WPADir},
			User: "netd", Caps: []uintptr{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW, unix.CAP_NET_BIND_SERVICE, unix.CAP_SYS_ADMIN, unix.CAP_SYS_TIME},
			Dir: NetdDir, Socket: NetdSocket, Notify: true, Watchdog: watchdog,
		},
		{
			Name: "linkd",
			Args: linkd,
			User: "linkd", Caps: []uintptr{unix.CAP_NET_ADMIN}, Netns: InsideNetns,
			Socket: LinkdSocket, Notify: true, Watchdog: watchdog,
		},
	}, labServices()...)
}

// LogonService is logind, where the organisation has logon. fprintd and its
// bus are its children.
func LogonService() Service {
	return Service{
		Name: "logind",
		Args: []string{"/bbin/logind", "run", "-config", attest.OrganizationFile, "-attestd", AttestdSocket, "-dir", LoginDir, "-vmm", strconv.Itoa(vmmID)},
		User: "logind", Socket: LogindSocket, Notify: true, Watchdog: watchdog,
	}
}

// closeCommand puts the closed ruleset in force in both namespaces.
func closeCommand() Service {
	return Service{Name: "netd close", Args: []string{"/bbin/netd", "close", "-inside", InsideNetns}}
}
