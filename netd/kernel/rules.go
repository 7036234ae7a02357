//go:build linux

package kernel

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"sekisho/netd/plan"
)

// TCP option kind of the maximum segment size, its length in the header and
// the offset of the value (RFC 9293, section 3.2).
const (
	tcpOptionMSS = 2
	mssOffset    = 2
	mssLength    = 2
)

// compile returns r as nftables expressions. It is pure.
func compile(r plan.Rule) []expr.Any {
	equal := func(data []byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data} }
	family, source, destination := byte(unix.NFPROTO_IPV4), uint32(12), uint32(16) // offsets in the IPv4 header, RFC 791 section 3.1
	if r.Six() {
		family, source, destination = unix.NFPROTO_IPV6, 8, 24 // RFC 8200, section 3
	}
	e := []expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, equal([]byte{family})}
	link := func(key expr.MetaKey, name string) {
		if name != "" {
			padded := make([]byte, unix.IFNAMSIZ)
			copy(padded, name)
			e = append(e, &expr.Meta{Key: key, Register: 1}, equal(padded))
		}
	}
	address := func(offset uint32, p netip.Prefix) {
		if !p.IsValid() {
			return
		}
		a := p.Masked().Addr().AsSlice()
		e = append(e, &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(len(a))})
		if !p.IsSingleIP() {
			mask := net.CIDRMask(p.Bits(), 8*len(a))
			e = append(e, &expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: uint32(len(a)), Mask: mask, Xor: make([]byte, len(a))})
		}
		e = append(e, equal(a))
	}
	port := func(offset uint32, p uint16) {
		if p != 0 {
			e = append(e, &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2},
				equal(binary.BigEndian.AppendUint16(nil, p)))
		}
	}
	link(expr.MetaKeyIIFNAME, r.In)
	link(expr.MetaKeyOIFNAME, r.Out)
	address(source, r.Source)
	address(destination, r.Destination)
	if r.Protocol != 0 {
		e = append(e, &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, equal([]byte{byte(r.Protocol)}))
	}
	if r.Types != (plan.Types{}) {
		e = append(e, &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1},
			&expr.Range{Op: expr.CmpOpEq, Register: 1, FromData: []byte{r.Types.From}, ToData: []byte{r.Types.To}})
	}
	port(0, r.SourcePort)
	port(2, r.DestinationPort)
	if r.Tracked != plan.Any {
		bit := uint32(expr.CtStateBitESTABLISHED)
		if r.Tracked == plan.Related {
			bit = expr.CtStateBitRELATED
		}
		e = append(e, &expr.Ct{Key: expr.CtKeySTATE, Register: 1},
			&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binary.NativeEndian.AppendUint32(nil, bit), Xor: make([]byte, 4)},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)})
	}
	switch r.Verdict {
	case plan.Accept:
		e = append(e, &expr.Verdict{Kind: expr.VerdictAccept})
	case plan.Clamp:
		// SYN set, RST clear, in the flags at offset 13. The kernel only ever
		// lowers the option (net/netfilter/nft_exthdr.c, nft_exthdr_tcp_set_eval).
		e = append(e, &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
			&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{0x06}, Xor: []byte{0}},
			equal([]byte{0x02}),
			&expr.Immediate{Register: 1, Data: binary.BigEndian.AppendUint16(nil, r.MSS)},
			&expr.Exthdr{SourceRegister: 1, Type: tcpOptionMSS, Offset: mssOffset, Len: mssLength, Op: expr.ExthdrOpTcpopt})
	case plan.RewriteSource:
		e = append(e, rewrite(12, r.To)...)
	case plan.RewriteDestination:
		e = append(e, rewrite(16, r.To)...)
	default:
		e = append(e, &expr.Verdict{Kind: expr.VerdictDrop})
	}
	return e
}

// rewrite puts an address at an offset of the IPv4 header and mends its
// checksum, at offset 10 there, and that of TCP or UDP, which cover the address
// too (linux/netfilter/nf_tables.h, NFT_PAYLOAD_L4CSUM_PSEUDOHDR).
func rewrite(offset uint32, to netip.Addr) []expr.Any {
	a := to.As4()
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: a[:]},
		&expr.Payload{
			OperationType: expr.PayloadWrite, SourceRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4,
			CsumType: expr.CsumTypeInet, CsumOffset: 10, CsumFlags: unix.NFT_PAYLOAD_L4CSUM_PSEUDOHDR,
		},
	}
}

// place is where a chain of that hook stands.
func place(h plan.Hook) (*nftables.ChainHook, *nftables.ChainPriority) {
	switch h {
	case plan.Input:
		return nftables.ChainHookInput, nftables.ChainPriorityFilter
	case plan.Output:
		return nftables.ChainHookOutput, nftables.ChainPriorityFilter
	case plan.Prerouting: // before connection tracking
		return nftables.ChainHookPrerouting, nftables.ChainPriorityRaw
	case plan.Postrouting: // after it
		return nftables.ChainHookPostrouting, nftables.ChainPriorityRef(-*nftables.ChainPriorityRaw)
	}
	return nftables.ChainHookForward, nftables.ChainPriorityFilter
}

func policy(c plan.Chain) nftables.ChainPolicy {
	if c.Open {
		return nftables.ChainPolicyAccept
	}
	return nftables.ChainPolicyDrop
}

// replaceRules puts the whole table in place in one transaction: either every
// chain and rule of it is in force afterwards, or none of the change is.
func (n *Namespace) replaceRules(r plan.Ruleset) error {
	table := &nftables.Table{Name: r.Table, Family: nftables.TableFamilyINet}
	n.nft.AddTable(table) // so that the deletion finds one
	n.nft.DelTable(table)
	n.nft.AddTable(table)
	for _, c := range r.Chains {
		p := policy(c)
		hook, priority := place(c.Hook)
		chain := n.nft.AddChain(&nftables.Chain{
			Name: string(c.Hook), Table: table, Type: nftables.ChainTypeFilter,
			Hooknum: hook, Priority: priority, Policy: &p,
		})
		for _, rule := range c.Rules {
			n.nft.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: compile(rule)})
		}
	}
	if err := n.nft.Flush(); err != nil {
		return fmt.Errorf("nftables table %s: %w", r.Table, err)
	}
	return nil
}

// holdsRules reports whether the kernel's table is exactly r.
func (n *Namespace) holdsRules(r plan.Ruleset) (bool, error) {
	chains, err := n.nft.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, fmt.Errorf("nftables chains: %w", err)
	}
	chains = slices.DeleteFunc(chains, func(c *nftables.Chain) bool { return c.Table.Name != r.Table })
	if len(chains) != len(r.Chains) {
		return false, nil
	}
	tables, err := n.nft.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, fmt.Errorf("nftables tables: %w", err)
	}
	// Flags would put a whole table out of force (NFT_TABLE_F_DORMANT,
	// linux/netfilter/nf_tables.h); ours has none.
	if !slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == r.Table && t.Flags == 0 }) {
		return false, nil
	}
	for _, want := range r.Chains {
		i := slices.IndexFunc(chains, func(c *nftables.Chain) bool { return c.Name == string(want.Hook) })
		if i < 0 {
			return false, nil
		}
		c := chains[i]
		hook, priority := place(want.Hook)
		if c.Type != nftables.ChainTypeFilter || c.Hooknum == nil || *c.Hooknum != *hook || c.Policy == nil || *c.Policy != policy(want) || c.Priority == nil || *c.Priority != *priority {
			return false, nil
		}
		rules, err := n.nft.GetRules(c.Table, c)
		if err != nil {
			return false, fmt.Errorf("nftables rules of %s: %w", c.Name, err)
		}
		if len(rules) != len(want.Rules) {
			return false, nil
		}
		for j, rule := range rules {
			if same, err := sameExpressions(rule.Exprs, compile(want.Rules[j])); err != nil || !same {
				return false, err
			}
		}
	}
	return true, nil
}

func sameExpressions(a, b []expr.Any) (bool, error) {
	if len(a) != len(b) {
		return false, nil
	}
	for i := range a {
		x, err := expr.Marshal(byte(nftables.TableFamilyINet), a[i])
		if err != nil {
			return false, err
		}
		y, err := expr.Marshal(byte(nftables.TableFamilyINet), b[i])
		if err != nil {
			return false, err
		}
		if !bytes.Equal(x, y) {
			return false, nil
		}
	}
	return true, nil
}
