package lab

import (
	"strings"

	"sekisho/attest"
)

// logon.go is the organisation's part in logons by the laptop's smart card:
// its policy, and its approvers.

// approvers are those whose permits count, two of them each.
var approvers = [...]string{"approver-a", "approver-b"}

func (l *Lab) approversFile() string { return l.lab("pki", "approvers.pem") }

// setLogon writes the approvers' public keys and, where the lab has logons,
// puts its policy into o. Few tries and a short lock-out: tests use them up.
func (l *Lab) setLogon(o *attest.Organization) error {
	var keys strings.Builder
	for _, name := range approvers {
		key, err := l.publicKey(name)
		if err != nil {
			return err
		}
		keys.WriteString(key)
	}
	if l.Logon {
		o.Logon = &attest.Logon{Key: attest.LogonRSA2048, PIN: true, Finger: true, FingerSeconds: 30,
			PINTries: 3, FingerTries: 3, LockSeconds: 30, Approvers: keys.String()}
		o.WorkDomain.MemoryMiB = 384
	}
	return writeFile(l.approversFile(), []byte(keys.String()), 0o644)
}
