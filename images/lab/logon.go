package lab

import (
	"context"
	"encoding/json"
	"path/filepath"
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

// cardPermit makes a permit for the laptop's card by attestctl's words, has it
// signed by both approvers and presents it.
func (l *Lab) cardPermit(ctx context.Context, stdin, device, user, do string, more ...string) error {
	file := l.lab("site", "permit.json")
	signed, err := l.attestctl(ctx, []byte(stdin), append([]string{"card", "permit", "-json", "-device", device, "-user", user, "-do", do, "-reason", "lab"}, more...)...)
	if err != nil {
		return err
	}
	for _, name := range approvers {
		if err := writeFile(file, signed, 0o600); err != nil {
			return err
		}
		if signed, err = l.attestctl(ctx, nil, "approval", "sign", "-json", "-key", l.lab("pki", name+".key"), file); err != nil {
			return err
		}
	}
	if err := writeFile(file, signed, 0o600); err != nil {
		return err
	}
	_, err = l.attestctl(ctx, nil, "card", "add", file)
	return err
}

// device is the one laptop's id.
func (l *Lab) device(ctx context.Context) (string, error) {
	out, err := l.attestctl(ctx, nil, "device", "list", "-json")
	if err != nil {
		return "", err
	}
	var list []struct {
		ID string `json:"device_id"`
	}
	if err := json.Unmarshal(out, &list); err != nil || len(list) != 1 {
		return "", err
	}
	return list[0].ID, nil
}

// releaseFile is what attestctl card check judges a card's key by.
func (l *Lab) releaseFile() string { return filepath.Join(l.out(), "release.json") }
