//go:build linux

package kernel

import (
	"errors"
	"testing"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"sekisho/netd/plan"
)

// TestUnreadableRulesAreReplaced: a kernel that does not say what it holds may
// hold something open. The plan's rules go in all the same, and Apply fails.
func TestUnreadableRulesAreReplaced(t *testing.T) {
	mute := errors.New("the kernel does not say")
	replaced := false
	conn, err := nftables.New(nftables.WithTestDial(func(messages []netlink.Message) ([]netlink.Message, error) {
		for _, m := range messages {
			switch uint16(m.Header.Type) & 0xff {
			case unix.NFT_MSG_NEWCHAIN:
				replaced = true
			case unix.NFT_MSG_GETCHAIN:
				return nil, mute
			}
		}
		return messages, nil
	}))
	if err != nil {
		t.Fatal(err)
	}
	n := Namespace{nft: conn}
	if err := n.Apply(plan.Closed().Inside); !errors.Is(err, mute) {
		t.Errorf("Apply: %v, want the kernel's error", err)
	}
	if !replaced {
		t.Error("the ruleset was left as it was")
	}
}
