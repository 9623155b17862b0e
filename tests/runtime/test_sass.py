"""Loops and instructions of disassembled kernels."""

from __future__ import annotations

from mugraph.runtime.sass import instructions, loops, read_code

KERNEL = """
.text.k:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   STL [R1], R2 ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64] ;
.L_x_0:
        /*0030*/              @!P0 HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0040*/                   LDL.LU R3, [R1] ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
        /*0060*/                   LDG.E.U16 R9, desc[UR4][R2.64] ;
        /*0070*/           @!UP2 BRA.U `(.L_x_1) ;
        /*0080*/               @P3 EXIT ;
        /*0090*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*00a0*/                   STG.E [R2.64], R9 ;
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   SYNCS.PHASECHK.TRANS64 P0, [R0] ;
        /*00d0*/               @P0 BRA `(.L_x_2) ;
.L_x_4:
        /*00e0*/                   BRA `(.L_x_4);
"""


def test_loops_end_with_a_branch_back_and_have_no_end_of_the_kernel_in_them():
    assert sorted(loops(instructions(KERNEL))) == [(0x20, 0x70), (0x30, 0x50)]


def test_instructions_are_counted_by_what_they_do():
    assert read_code(KERNEL) == {
        "spills": 1,
        "spills_outside": 1,
        "wide_loads": 1,
        "narrow_loads": 1,
        "matrix_ops": 1,
        "loop_instructions": 3,  # of the inner loop, which has the matrix multiply
    }


def test_a_spill_in_a_loop_is_not_taken_for_one_outside():
    moved = KERNEL.replace("LDC R1, c[0x0][0x28]", "MOV R1, R2").replace(
        "LDG.E.U16 R9, desc[UR4][R2.64]", "STL [R1], R9"
    )
    assert (read_code(moved)["spills"], read_code(moved)["spills_outside"]) == (2, 1)


def test_without_matrix_multiplies_the_main_loop_is_the_one_that_loads():
    without = KERNEL.replace("HMMA.16816.F32 R8, R4, R6, R8", "FADD R8, R4, R6")
    assert read_code(without)["loop_instructions"] == 6


def test_nothing_is_nothing():
    assert loops(instructions("")) == []
    assert sum(read_code("").values()) == 0
